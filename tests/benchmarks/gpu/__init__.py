"""What a memory costs on a GPU, beside the targets: one table in at most four minutes. The same code runs on a small
host on the CPU, without what only a GPU has.

python -m tests.benchmarks --device cuda --json figures.json --markdown figures.md
python -m tests.benchmarks --device cuda --only prefill waits
python -m tests.benchmarks --scale tiny                           # on the CPU
"""

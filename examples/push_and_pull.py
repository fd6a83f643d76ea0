"""Push an adapter to the Hugging Face Hub, and attach it from there.

hf auth login
python examples/push_and_pull.py user/mal-demo           # a private repository, made if it doesn't exist
"""

import sys

from mal_adapter import MemoryAdapter, attach_memory
from mal_adapter.demo import ADAPTER_FOLDER, HOST_FOLDER
from mal_adapter.ser.loading import load_host

if len(sys.argv) != 2:
    sys.exit(__doc__)
repo_id = sys.argv[1]

adapter = MemoryAdapter.from_pretrained(ADAPTER_FOLDER)
print("pushed", adapter.push_to_hub(repo_id, private=True).oid)

model, _ = load_host(str(HOST_FOLDER))
with attach_memory(model, adapter=repo_id) as memory:
    print("pulled", memory.adapter.fingerprint(), memory.adapter.fingerprint() == adapter.fingerprint())
    print(memory)

"""Make the pictures of `how_it_works.md` with the library.

python docs/pictures                      # measures, writes figures.json, and draws the SVG files beside it
python docs/pictures --draw               # only draws, from figures.json
python docs/pictures --draw --png FOLDER  # draws PNG files into a folder
"""

import argparse
import json
from pathlib import Path

import dialogue
import hooks
import recall
import style
import trust_region

HERE = Path(__file__).parent
MEASURED = {"recall": recall, "trust_region": trust_region, "dialogue": dialogue}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="take the figures from figures.json")
    parser.add_argument("--png", type=Path, help="folder for PNG files instead of the SVG files")
    options = parser.parse_args()

    kept = HERE / "figures.json"
    if not options.draw:
        figures = {name: module.measure() for name, module in MEASURED.items()}
        kept.write_text(json.dumps(figures, indent=1) + "\n")
    figures = json.loads(kept.read_text())
    drawn = {"hooks": hooks.draw()} | {name: module.draw(figures[name]) for name, module in MEASURED.items()}
    for name, figure in drawn.items():
        style.save(figure, options.png / f"{name}.png" if options.png else HERE / f"{name}.svg")

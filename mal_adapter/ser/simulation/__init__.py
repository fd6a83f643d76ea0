"""Dialogues made of single clips: who speaks when and how, drawn at random; the sound is that of the clips.

from mal_adapter.ser.clips import read_clips
from mal_adapter.ser.simulation import SimulationConfig, simulate
simulation = simulate([read_clips("ravdess", "RAVDESS")], SimulationConfig.preset("mood"))
simulation.write("dialogues")

docs/corpora.md says what such dialogues can and can't show.
"""

from mal_adapter.ser.simulation.config import PRESETS, SimulationConfig
from mal_adapter.ser.simulation.simulate import simulate
from mal_adapter.ser.simulation.simulation import Simulation

__all__ = ["PRESETS", "Simulation", "SimulationConfig", "simulate"]

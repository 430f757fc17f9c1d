"""Lets the tests import the modules of the repository root, wherever pytest is started."""
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

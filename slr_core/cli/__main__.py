"""Run ``slr`` as ``python -m slr_core.cli``."""

from slr_core.cli import main

main()

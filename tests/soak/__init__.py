"""Simulators, learners and a trainer under random faults for minutes: ``python -m tests.soak``, or ``make soak``."""

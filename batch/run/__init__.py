"""How a plan is carried out: lifecycle, verdicts, pacing, budget, journal, images, runner."""

"""Run folder and resume, optimizer step, plain fit loop, schedules, data mixing, distribution."""

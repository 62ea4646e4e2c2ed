"""Programs that print a measurement, of ours and of diffusers, on the same weights, on one machine, in one run."""

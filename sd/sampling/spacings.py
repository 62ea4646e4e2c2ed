"""The names of noise schedules, which noise.py makes: apart from it, since flags are described without torch."""

SPACINGS = ("leading", "trailing", "linspace", "karras", "exponential", "lcm")

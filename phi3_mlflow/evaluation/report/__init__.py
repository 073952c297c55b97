"""The HTML report of an evaluation, and the plots in it."""

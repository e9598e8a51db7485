"""How sure we are, and how it is shown: intervals, curves, claims, figures."""

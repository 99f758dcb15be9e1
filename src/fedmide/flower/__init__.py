"""Federations over Flower: simulated on one machine, or deployed at sites with keys and certificates."""

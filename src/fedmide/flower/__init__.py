"""Flower as the engine between processes and hospitals: simulation, and deployment with keys and certificates."""

"""fedmide: federated instruction tuning, personalised by data alone (FedMIDE)."""

__version__ = "0.1.0"

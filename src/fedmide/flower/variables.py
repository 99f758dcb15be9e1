"""Environment variables that our processes and Flower's share."""

LINK = "FEDMIDE_LINK"
"""The socket where the process that runs the rounds waits for the server app."""


SITE = "FEDMIDE_SITE"
"""The folder of the node's site."""


RUN = "FEDMIDE_RUN"
"""The run folder of a simulation."""


NO_TELEMETRY = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
"""Environment variables that switch off the telemetry of Flower and Ray."""

"""Many runs: compared, swept over a setting, checked against a known truth."""

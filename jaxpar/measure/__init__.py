"""What a step costs: compiled for a cluster that is not there, or timed on the devices that are."""

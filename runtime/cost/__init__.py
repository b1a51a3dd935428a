"""What a step costs: launches, bytes, bandwidth, and the machine."""

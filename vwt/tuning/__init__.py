"""What to do on this device: latency profiles, the search, schedules and plans."""

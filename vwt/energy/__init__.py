"""Energy in joules: sensors, and a meter over them."""

"""Where local models run, and the proof that they run as they were trained."""

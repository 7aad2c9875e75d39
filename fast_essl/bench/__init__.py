"""`fast-essl bench`: how fast each room is on this machine, what limits a run, and what a cluster would make of it."""

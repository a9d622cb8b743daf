"""What a run needs besides its model: devices, processes, signals, locks and files."""

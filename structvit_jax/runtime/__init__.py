"""The devices, processes, signals, locks and files of a run."""

"""Training and evaluation: this room owns the mesh, the state and the files of a run."""

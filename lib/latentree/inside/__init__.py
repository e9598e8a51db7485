"""Reading and changing a run of a model, whatever its architecture calls its parts."""

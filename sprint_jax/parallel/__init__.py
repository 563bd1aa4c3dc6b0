"""One mesh of devices, one rule that splits arrays over it, and the processes of a run."""

"""Our programs beside others': workloads, paired rounds, the torch networks to compare with."""

"""The shared compression backend, and what each MoE family looks like. Anyone may use it without the rest."""

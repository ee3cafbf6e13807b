"""Find the MoE layers of a model, watch them, hand batches to recorders, prove the capture right. Needs torch."""

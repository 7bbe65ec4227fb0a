"""Questions about speed, answered by measuring: ablate, tune, doctor."""

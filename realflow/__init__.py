"""RealFlow: a dataflow-graph engine for RLHF and RL on verifiable rewards."""

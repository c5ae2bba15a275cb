"""What a run shows of itself: metrics, samples, trace, progress and report. Without torch."""

"""Lower tiers: blocking, batched stores of frames. No policy, no threads."""

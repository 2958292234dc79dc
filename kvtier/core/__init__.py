"""The pure heart of kvtier: no clock, thread, socket, file, numpy or torch."""

"""Ray as the control plane; the only importer of ray."""

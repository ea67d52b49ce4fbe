"""Foreign formats: what other projects and scanners write, read into an `Anatomy` or a `Scan`. The method imports none
of it."""

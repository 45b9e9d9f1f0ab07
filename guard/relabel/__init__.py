"""The durable queue of flagged inputs, and what reviewers said of them. Import `Queue` from `guard.relabel.queue`."""

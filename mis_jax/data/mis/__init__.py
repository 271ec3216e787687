"""The published MIS files: reading them, and the set of records that `data build` makes."""

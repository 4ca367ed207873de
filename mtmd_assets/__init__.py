"""The Dagster code location: what runs when, on which day."""

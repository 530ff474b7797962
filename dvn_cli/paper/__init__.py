"""The paper's scenarios: its figures, and beside them what finished runs reach."""

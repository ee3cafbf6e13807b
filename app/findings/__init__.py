"""What a run says, in plain sentences with their evidence: shown by the Overview, the report and ``moescope show``."""

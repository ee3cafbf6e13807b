"""What people see: the dashboard, the figures, and the ``moescope`` command."""

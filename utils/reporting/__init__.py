"""What people read: tables, figures, sweeps, the HTML report and model cards."""

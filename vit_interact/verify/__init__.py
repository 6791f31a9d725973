"""The paper's two verifications: accuracy inside windows, and without removed patches."""

"""The paper's two verifications: accuracy inside windows, and without removed patches."""

from vit_interact.verify import removal, windows
from vit_interact.verify.subject import Subject

__all__ = ["Subject", "removal", "windows"]

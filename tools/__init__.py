"""Programs for developers: golden files, parity with other libraries."""

"""What several test files share: tiny models, handmade edits, slow references, cases."""

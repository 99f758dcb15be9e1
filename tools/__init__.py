"""Programs that write the generated pages and check the language; they are not in the wheel."""

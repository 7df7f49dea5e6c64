"""What is made once for a release, by scripts: licences, the bill of materials."""

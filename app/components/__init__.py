"""Parts of pages that several pages share. They draw; they compute nothing."""

"""Network boot: dnsmasq kept running, boot scripts, the listener for agents and files."""

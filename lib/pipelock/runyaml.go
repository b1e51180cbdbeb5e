package pipelock

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"net/netip"
	"path/filepath"
	"slices"

	"github.com/bottle-tools/bottle/lib/fault"
)

// RunOptions is what the policy in a document leaves open, because it differs
// from one run to the next.
type RunOptions struct {
	Listen        netip.AddrPort // of the proxy; loopback, never port 0: pipelock does not tell which it got
	MetricsListen netip.AddrPort // another port number than Listen, as pipelock demands
	Sentinel      string         // absolute path; while the file exists pipelock denies all and cuts tunnels
	InstanceID    string         // vm.id, in every line of the log
	Own           []netip.Addr   // the host's addresses, which pipelock must not dial either
}

// RunYAML gives the file that pipelock is run with: the policy of a document
// and what this run adds. The digest is of the returned bytes, in bare hex as
// pipelock logs it (config_hash). A policy that is less strict than YAML writes
// it is refused (65).
func RunYAML(policy []byte, o RunOptions) (run []byte, sha string, err error) {
	c, err := decode(policy)
	if err == nil {
		err = c.strict()
	}
	if err != nil {
		return nil, "", fault.New(fault.Data, "bad_pipelock_yaml", "the pipelock configuration is not one that bottle-egress writes: %w", err).
			WithHint("leave egress out of the document; bottle-egress computes it from bottle")
	}
	if err := o.check(); err != nil {
		return nil, "", fault.New(fault.Bug, "bug", "pipelock run options: %w", err)
	}
	c.Agent = o.InstanceID
	c.Emit = &emit{InstanceID: o.InstanceID}
	c.FetchProxy.Listen = o.Listen.String()
	c.Metrics = o.MetricsListen.String()
	c.KillSwitch = &killSwitch{SentinelFile: o.Sentinel}
	for _, a := range o.Own {
		a = a.WithZone("").Unmap()
		if !special(a) {
			c.Internal = append(c.Internal, netip.PrefixFrom(a, a.BitLen()).String())
		}
	}
	c.Internal = unique(c.Internal)
	if run, err = encode(c); err != nil {
		return nil, "", err
	}
	sum := sha256.Sum256(run)
	return run, hex.EncodeToString(sum[:]), nil
}

// strict names the first thing in which c is weaker than what YAML writes.
func (c *config) strict() error {
	has := func(r string) bool { return slices.Contains(c.Internal, r) }
	missing := slices.IndexFunc(specialRanges(), func(r string) bool { return !has(r) })
	switch {
	case c.Mode != "strict" || !c.Enforce || !c.BindAgent:
		return errors.New("it does not enforce the allowlist")
	case len(c.APIAllowlist) == 0:
		return errors.New("it has no allowlist")
	case !c.ForwardProxy.Enabled || !c.ForwardProxy.SNIVerification:
		return errors.New("it does not verify the server name")
	case !c.RequestBody.Enabled || c.RequestBody.Action != "block" || !c.DLP.IncludeDefaults:
		return errors.New("it does not block secrets in bodies")
	case missing >= 0:
		return errors.New("internal lacks " + specialRanges()[missing])
	case c.FetchProxy.Listen != "" || c.Metrics != "" || c.KillSwitch != nil || c.Emit != nil:
		return errors.New("it holds settings of one run")
	case c.TLS.Enabled || c.WebSocket.Enabled || c.Logging.Format != "json" || c.Logging.Output != "stdout":
		return errors.New("it is set up in another way")
	}
	return nil
}

func (o *RunOptions) check() error {
	ok := func(a netip.AddrPort) bool { return a.Addr().IsLoopback() && a.Port() != 0 }
	switch {
	case !ok(o.Listen) || !ok(o.MetricsListen):
		return errors.New("listens on loopback, on ports that are known")
	case o.Listen.Port() == o.MetricsListen.Port():
		return errors.New("the two ports are the same")
	case !filepath.IsAbs(o.Sentinel):
		return errors.New("sentinel is not an absolute path")
	case o.InstanceID == "":
		return errors.New("no instance id")
	}
	return nil
}

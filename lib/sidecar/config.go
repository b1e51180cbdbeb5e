package sidecar

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
)

// MaxBody bounds a body that mitmdump holds for its addons. It ends requests
// and answers that are larger: what no addon has seen does not pass.
const MaxBody = "100m"

// Options is what Start needs.
type Options struct {
	Program string // absolute path
	// Dir is a folder of the bottle's own, 0700 and with an absolute path. Start
	// lays conf/ (configuration, certificates, copies of the addons), home/ and
	// mitmdump.log into it.
	Dir    string
	Addons []Addon
	// Back is where it sends everything: the gate's other side, host:port.
	Back string
	// Auth is asked of whoever connects to it, and BackAuth given to Back:
	// user:password. They differ: one who takes the port when it is free is told
	// Auth by the gate, and must not get anywhere with it.
	Auth, BackAuth string
	// Authority is certificate and key of what it shows to the gate (ca.Marshal).
	Authority []byte
	// BackCA is the certificate by which it knows Back.
	BackCA []byte
	// Host is one that it will be asked for, to see whether it serves.
	Host string
}

// Addon is a Python file, in the bytes that were planned and trusted.
type Addon struct {
	Name string
	Code []byte
}

// NewAuth makes the word that gate and sidecar know each other by, since other
// users of the host can reach their ports.
func NewAuth() string {
	b := make([]byte, 24)
	_, _ = rand.Read(b) // never fails: crypto/rand
	return "bottle:" + hex.EncodeToString(b)
}

// Load reads the addons of a plan, through read. One that is not the file that
// was planned is a fault 65 (addon_changed).
func Load(addons []plan.Addon, read func(path string) ([]byte, error)) ([]Addon, error) {
	var all []Addon
	for i, a := range addons {
		at := fmt.Sprintf("bottle.egress.mitmdump.addons[%d]", i)
		code, err := read(a.Path)
		if err != nil {
			return nil, fault.New(fault.NoInput, "no_addon", "addon: %w", err).At(at).WithHint("put the file back, or plan again")
		}
		if plan.SHA256(code) != a.SHA256 {
			return nil, fault.New(fault.Data, "addon_changed", "%s is not the addon that was planned", a.Path).At(at).
				WithHint("plan again, read what changed, and trust it: bottle-vm trust")
		}
		all = append(all, Addon{Name: filepath.Base(a.Path), Code: code})
	}
	return all, nil
}

// lay writes the folder, and gives the digest of what decides how mitmdump
// behaves: its options but for ports and words, and the addons.
//
// The addons are copies in a folder in which nothing else is, because Python
// imports from the folder of a script: beside the original a guest may put what
// it likes.
func lay(o *Options, listen netip.AddrPort) (digest string, err error) {
	conf := filepath.Join(o.Dir, "conf")
	for _, d := range []string{conf, filepath.Join(o.Dir, "home")} {
		if err := os.Mkdir(d, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
			return "", cannotCreate(err)
		}
	}
	var sums strings.Builder
	scripts := []string{}
	for i, a := range o.Addons {
		dir := filepath.Join(conf, fmt.Sprintf("addon-%d", i))
		if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
			return "", cannotCreate(err)
		}
		path := filepath.Join(dir, a.Name)
		if err := os.WriteFile(path, a.Code, 0o600); err != nil {
			return "", cannotCreate(err)
		}
		scripts = append(scripts, path)
		sums.WriteString(plan.SHA256(a.Code) + "\n")
	}
	options := settings()
	fixed, err := json.Marshal(options)
	if err != nil {
		return "", fault.New(fault.Bug, "bug", "mitmdump's options: %w", err)
	}
	options["listen_host"], options["listen_port"] = listen.Addr().String(), listen.Port()
	options["proxyauth"], options["upstream_auth"] = o.Auth, o.BackAuth
	options["ssl_verify_upstream_trusted_ca"] = filepath.Join(conf, "back.pem")
	options["scripts"] = scripts
	config, err := json.Marshal(options) // JSON is YAML
	if err != nil {
		return "", fault.New(fault.Bug, "bug", "mitmdump's options: %w", err)
	}
	for name, content := range map[string][]byte{"config.yaml": config, "mitmproxy-ca.pem": o.Authority, "back.pem": o.BackCA} {
		if err := os.WriteFile(filepath.Join(conf, name), content, 0o600); err != nil {
			return "", cannotCreate(err)
		}
	}
	return plan.SHA256(append(fixed, sums.String()...)), nil
}

// settings are the options that are the same for every bottle.
func settings() map[string]any {
	return map[string]any{
		"connection_strategy": "lazy", // no connection that no request asked for
		"upstream_cert":       false,
		"http2":               false, // the gate reads HTTP/1.1
		"rawtcp":              false,
		"onboarding":          false,
		"ssl_insecure":        false,
		"body_size_limit":     MaxBody,
		"flow_detail":         0,
		"termlog_verbosity":   "info",
	}
}

// Digest is RunConfigSHA256 of what lies in a sidecar's folder now. It is an
// error if that is not what Start has laid there for addons and the port listen:
// mitmdump loads an addon again when its file has changed.
func Digest(dir string, addons []plan.Addon, listen string) (string, error) {
	conf := filepath.Join(dir, "conf")
	raw, err := os.ReadFile(filepath.Join(conf, "config.yaml"))
	if err != nil {
		return "", err
	}
	var options map[string]any
	if err := json.Unmarshal(raw, &options); err != nil {
		return "", fmt.Errorf("config.yaml: %w", err)
	}
	if got := fmt.Sprintf("%v:%v", options["listen_host"], options["listen_port"]); got != listen {
		return "", fmt.Errorf("config.yaml names port %s", got)
	}
	if got := options["ssl_verify_upstream_trusted_ca"]; got != filepath.Join(conf, "back.pem") {
		return "", fmt.Errorf("config.yaml trusts %v", got)
	}
	scripts := []any{}
	var sums strings.Builder
	for i, a := range addons {
		path := filepath.Join(conf, fmt.Sprintf("addon-%d", i), filepath.Base(a.Path))
		scripts = append(scripts, path)
		code, err := os.ReadFile(path)
		if err != nil {
			return "", err
		}
		sums.WriteString(plan.SHA256(code) + "\n")
		entries, err := os.ReadDir(filepath.Dir(path))
		if err != nil {
			return "", err
		}
		if len(entries) != 1 {
			return "", fmt.Errorf("%s holds more than the addon", filepath.Dir(path))
		}
	}
	if !reflect.DeepEqual(options["scripts"], any(scripts)) {
		return "", fmt.Errorf("config.yaml runs %v", options["scripts"])
	}
	for _, name := range []string{"listen_host", "listen_port", "proxyauth", "upstream_auth", "ssl_verify_upstream_trusted_ca", "scripts"} {
		delete(options, name)
	}
	fixed, err := json.Marshal(options)
	if err != nil {
		return "", err
	}
	return plan.SHA256(append(fixed, sums.String()...)), nil
}

// Planned is RunConfigSHA256 as it follows from a plan.
func Planned(addons []plan.Addon) (string, error) {
	fixed, err := json.Marshal(settings())
	if err != nil {
		return "", err
	}
	for _, a := range addons {
		fixed = append(fixed, a.SHA256+"\n"...)
	}
	return plan.SHA256(fixed), nil
}

func cannotCreate(err error) error {
	return fault.New(fault.CantCreate, "cannot_create", "mitmdump's folder: %w", err)
}
